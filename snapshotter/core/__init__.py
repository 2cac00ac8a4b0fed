"""What everything else stands on: words (model), errors, labels, undo. Imports nothing of ours above itself."""
