"""Tables, plots and one HTML page from what a run measured.

``schema`` names the dictionary that all of it reads, ``read`` checks a file of it, ``ratios`` compares two models,
``rows`` turns it into lines of text, ``tables`` shows them in a terminal, ``plots`` draws and ``page`` writes the page.
"""
