"""From here to the Hub and to other packages' formats, and back."""
