"""Service plans: which device serves which model, and who is given the larger ones."""
