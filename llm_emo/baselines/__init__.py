"""The specialised models of the papers: networks, features and losses; importing loads nothing."""
