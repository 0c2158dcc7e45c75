"""How a video is judged: left ventricle, ejection fraction, synchrony, image quality, speed."""
