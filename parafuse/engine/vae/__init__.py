"""An autoencoder's decode and encode on several ranks."""
