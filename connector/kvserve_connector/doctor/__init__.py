"""``kvserve doctor``: looks at a pod from inside, and says what to do about what it finds."""
