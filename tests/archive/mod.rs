//! Images made by hand: tar archives byte by byte, OCI layouts around them, trees of all that a layer can do.
#![allow(dead_code, reason = "each test binary uses its part")]

pub(crate) mod layout;
pub(crate) mod odd_trees;
pub(crate) mod tar;
