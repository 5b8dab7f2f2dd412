"""What this machine is and what a bundle needs, compared before anything is loaded."""
