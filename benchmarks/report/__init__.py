"""From stored results to what is claimed: scoreboard, tables, pictures."""
