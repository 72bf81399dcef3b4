"""The charts of the page as pictures, for a paper or a slide."""
def draw(made, drawn, folder): raise OSError(1,"not yet")
