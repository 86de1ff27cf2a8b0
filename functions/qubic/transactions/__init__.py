"""What the service signs, from the signature until its fate is known."""
