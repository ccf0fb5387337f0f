"""Every transformer class of diffusers in every layout: measured, recorded, compared with the record."""
