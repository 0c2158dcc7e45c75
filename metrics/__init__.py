"""How a video is judged: the left ventricle, ejection fraction, synchrony, picture quality, speed."""
