"""Whether a finished file is what its recipe makes of its sources: computed once more, slowly, by integers."""
