"""pyfused inside engines that exist: each file plugs the ops into one of them and imports it only when it is used."""
