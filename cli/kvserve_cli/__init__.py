"""The one console script, `kvserve`: it finds the parts' commands by entry point and knows nothing of them.

Each image holds only some parts, so a command whose part can't be imported is listed with the extra that brings it.
"""
