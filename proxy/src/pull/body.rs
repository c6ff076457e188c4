//! The body of a response, whatever it contains.

use bytes::Bytes;

use super::ListBody;
use super::blob::{PARTS_AHEAD, Parts};
use crate::fill::{PART_BYTES, PassthroughStream, Reader};
use crate::source::Broken;

/// The body of a response.
pub enum Body {
    /// Whole in memory, or already sent.
    Memory(Option<Bytes>),
    File(Reader),
    Passing(Box<PassthroughStream>),
    List(Box<ListBody>),
    Parts(Box<Parts>),
}

/// Memory that each list body counts as: buffers of the upstream connection, and the copy. Larger: fewer
/// concurrent lists. Smaller: lists exceed the memory limit.
const LIST_BYTES: usize = 512 * 1024;

impl Body {
    /// The next piece; None at the end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Broken> {
        match self {
            Self::Memory(bytes) => Ok(bytes.take().filter(|bytes| !bytes.is_empty())),
            Self::File(reader) => reader.next().await,
            Self::Passing(passage) => passage.next().await,
            Self::List(list) => list.next().await,
            Self::Parts(parts) => parts.next().await,
        }
    }

    /// The client does not read: closes a source that can be opened again.
    pub fn release(&mut self) {
        if let Self::Passing(passage) = self {
            passage.release();
        }
    }

    /// Bytes in memory until they are sent, also while the client does not read.
    pub fn held(&self) -> usize {
        match self {
            Self::Memory(Some(bytes)) => bytes.len(),
            Self::Passing(passage) => passage.held(),
            Self::List(_) => LIST_BYTES,
            // The part that is sent, and those that are opened ahead.
            Self::Parts(_) => PART_BYTES * (PARTS_AHEAD + 1),
            Self::Memory(None) | Self::File(_) => 0,
        }
    }
}
