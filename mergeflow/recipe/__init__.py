"""What was asked for: model sets, selections, shares and targets. Pure values and the rules that make them."""
