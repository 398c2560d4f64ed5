"""Models on a page in the browser, here or as a Space of the Hub. It needs `pip install "pvt_hf[demo]"`."""
