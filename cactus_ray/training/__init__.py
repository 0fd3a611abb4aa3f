"""Certified training: losses, attacks, weight perturbations, schedules, and the one loop that all methods share."""
