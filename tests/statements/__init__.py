"""Each statement: the states before and after, its text, its plan."""
