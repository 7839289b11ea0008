"""The backends: each runs a call (call.py) and returns an outcome; reference.py is the specification of all of them."""
