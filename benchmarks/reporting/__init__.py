"""Tables, summary, plot, limits and the description of the machine."""
