from hypothesis import settings

# A slow machine is no error: the first use of torch alone takes longer than the deadline of an example.
settings.register_profile("steady", deadline=None)
settings.load_profile("steady")
