//! The parsers of dray alone. The files beside this one are links to `proxy/src`, so that a fuzz
//! build takes seconds and not a whole proxy.

pub mod config;
pub mod oci;
pub mod upstream {
    pub mod challenge;
}
