"""Lightning callbacks that analyse the trained model when fit ends."""
