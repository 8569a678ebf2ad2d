"""What is made once, before training: public packages become files, images become latents."""
