"""Task scores: a second check of quality, by what a model gets right rather than by its predictions.

`items` are what is asked, read from JSON lines or built in; `scoring` answers them with an exact and a compressed KV
cache; `score` compares both.
"""
