"""What operators look at: dashboards, recording rules and alerts, as plain data made from one typed source."""
