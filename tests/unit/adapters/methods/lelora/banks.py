"""What tests of LeLoRA's banks share: units of all shapes, and which components they hold."""

SHAPES = [(16, 20), (24, 17), (20, 16), (17, 17)]
RANKS = [0, 2, 4]
PLACES = ["primary", "medium", "minor"]


def first_index(place, d, r):
    """Where a slice of r singular indices begins."""
    return {"primary": 0, "medium": d // 2, "minor": d - r}[place]


def held(unit, locations, largest=4):
    """Singular indices of a unit's components, in their order."""
    d = min(unit.out_features, unit.in_features)
    return [first_index(p, d, largest) + j for p in locations for j in range(largest)]
