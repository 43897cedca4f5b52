"""Items as token paths: catalogue, trie, how decisive each token is, and storage of all three."""
