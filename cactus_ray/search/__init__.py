"""From a search space to the points of a front: what is asked, drawn, recorded and compared."""
