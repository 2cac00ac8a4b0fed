"""What is protected: the config, a target's roots and volumes, and profiles. Knows no verb."""
