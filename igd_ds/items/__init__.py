"""Items as token paths: catalogue (item to tokens), trie (their prefixes), decisiveness (what a token decides), store."""
