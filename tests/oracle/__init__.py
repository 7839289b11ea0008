"""Independent oracles: predictive coding written from its equations, sharing no code with the package."""
