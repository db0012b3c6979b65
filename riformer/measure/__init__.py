"""Times, limits and costs of networks and trainings."""
