"""Screens archives of chest CT for COVID-19 on Ray, and trains the network it screens with."""
