"""Parameters -> numbers: encoding, exact retrieval, metrics, and the tasks made of them. Trains and exports nothing."""
