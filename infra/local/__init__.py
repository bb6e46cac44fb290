"""Services on loopback, the demo, and a served endpoint, for one machine."""
