"""The main job: samples -> distil -> evaluate -> save."""
