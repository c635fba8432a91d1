"""`understudy doctor`: is this machine ready, and what to do where it is not. One file for each concern."""
