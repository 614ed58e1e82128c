"""From a recipe to artifacts in the store: plan, disk, one pass, build, judge, settle; and the same again."""
