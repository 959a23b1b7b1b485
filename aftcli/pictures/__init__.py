"""Pictures of explanations: colours, overlays, figures (Figure 3), grids."""
