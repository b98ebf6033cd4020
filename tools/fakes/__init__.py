"""Stand-ins for weights, servers and services, for the tests and the demo."""
