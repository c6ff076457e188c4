//! Writes a response, by the cheapest way for its body: `sendfile`, corked, or piece by piece.

use std::pin::pin;

use bytes::Bytes;
use http::{Method, StatusCode};
use pingora::prelude::{Error, ErrorType};
use pingora::protocols::http::ServerSession as Session;
use tokio::time::timeout;

use super::exchange::{CLIENT_DISCONNECTED, Exchange, NO_SOURCE};
use super::sendfile::{self, SendfileBody};
use super::slow_clients::CLIENT_STALL_TIMEOUT;
use super::socket::{self, Socket};
use crate::bandwidth::RESERVED_BYTES;
use crate::pull::Body;
use crate::respond::PreparedResponse;
use crate::source::Broken;
use crate::times::STALL_TIMEOUT;

/// Writes a response. After an error the connection must close: the client detects the failure by the missing bytes.
pub(super) async fn send(
    session: &mut Session,
    exchange: &mut Exchange,
    mut response: PreparedResponse,
) -> pingora::Result<()> {
    exchange.status = response.status.as_u16();
    exchange.reason = response.reason.take().filter(|_| !matches!(response.status, StatusCode::UNAUTHORIZED));
    exchange.source = response.from.map_or(NO_SOURCE, |from| from.as_str());
    if !session.is_body_empty() {
        // The request has a body, such as a push. It is not read, so the connection cannot be reused.
        session.set_keepalive(None);
    }
    let mut head = response.head(&exchange.id);
    if let Some(seal) = exchange.seal.take() {
        let (name, value) = seal.sign(exchange.status, &head.headers);
        head.insert_header(name, value)?;
    }
    if session.req_header().method == Method::HEAD {
        response.body = Body::Memory(None);
        bounded(session.write_response_header(Box::new(head))).await?;
        exchange.first_byte = Some(exchange.started.elapsed());
        return Ok(());
    }
    if let Body::File(reader) = &mut response.body
        && reader.left() >= sendfile::MIN_SENDFILE_BYTES
        && let Some(socket) = Socket::of_plain(session)
    {
        bounded(sendfile::write_head(session, head)).await?;
        let max_chunk = if exchange.throttle.is_some() { RESERVED_BYTES } else { sendfile::MAX_CHUNK_BYTES };
        let mut sending = SendfileBody::new(socket, reader, max_chunk);
        loop {
            let waited = tokio::select! {
                biased;
                waited = exchange.ready() => waited,
                () = sending.closed() => return Err(exchange.fail(&Broken(CLIENT_DISCONNECTED.into()))),
            };
            sending.excuse(waited);
            let Some(sent) = sending.next().await.map_err(|broken| exchange.fail(&broken))? else { break };
            exchange.count_sent(sent);
        }
        return Ok(());
    }
    let small = socket::CORKED_SIZES.contains(&response.body.held());
    if small {
        socket::cork(session);
    }
    bounded(session.write_response_header(Box::new(head))).await?;
    let client = if matches!(response.body, Body::Memory(_)) { None } else { Socket::of(session) };
    // Manifests and errors are counted, but do not wait for a bandwidth limit.
    let is_limited = !matches!(response.body, Body::Memory(_));
    loop {
        let next = async {
            if is_limited {
                exchange.ready().await;
            }
            response.body.next().await
        };
        let next = tokio::select! {
            biased;
            next = next => next,
            () = disconnected(session, client.as_ref()) => Err(Broken(CLIENT_DISCONNECTED.into())),
        };
        let Some(piece) = next.map_err(|broken| exchange.fail(&broken))? else { break };
        let len = piece.len() as u64;
        let mut writing = pin!(session.write_response_body(piece, false));
        let written = match timeout(STALL_TIMEOUT, &mut writing).await {
            Ok(written) => written,
            Err(_) => {
                response.body.release();
                bounded(writing).await
            }
        };
        written?;
        exchange.count_sent(len);
    }
    bounded(session.write_response_body(Bytes::new(), true)).await?;
    if small {
        socket::uncork(session);
    }
    Ok(())
}

/// Bounds one write. Pingora's own write timeout covers bodies only, and restarts with each HTTP/2 window.
async fn bounded(writing: impl Future<Output = pingora::Result<()>>) -> pingora::Result<()> {
    let written = timeout(CLIENT_STALL_TIMEOUT, writing).await;
    written.unwrap_or_else(|_| Error::e_explain(ErrorType::WriteTimedout, "the client reads too slowly"))
}

/// Ends when the client has disconnected: its connection on HTTP/1.1, its stream on HTTP/2.
async fn disconnected(session: &mut Session, socket: Option<&Socket>) {
    if let Some(socket) = socket {
        socket.closed().await;
    } else if let Some(closed) = session.watch_h2_stream_close() {
        let _ = closed.await;
    } else {
        std::future::pending::<()>().await;
    }
}
