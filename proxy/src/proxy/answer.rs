//! Writes an answer, by the shortest way that its body has to the client.

use std::pin::pin;

use bytes::Bytes;
use http::{Method, StatusCode};
use pingora::prelude::{Error, ErrorType};
use pingora::protocols::http::ServerSession as Session;
use tokio::time::timeout;

use super::exchange::{Exchange, LEFT, NO_SOURCE};
use super::sendfile::{self, SendfileBody};
use super::slow_clients::PATIENCE;
use super::socket::{self, Socket};
use crate::pull::Body;
use crate::respond::PreparedResponse;
use crate::source::Broken;
use crate::times::STALL_TIMEOUT;

/// Writes an answer. An error means that the connection must close: the client sees fewer bytes
/// than announced, and knows.
pub(super) async fn send(
    session: &mut Session,
    exchange: &mut Exchange,
    mut reply: PreparedResponse,
) -> pingora::Result<()> {
    exchange.status = reply.status.as_u16();
    exchange.reason = reply.reason.take().filter(|_| !matches!(reply.status, StatusCode::UNAUTHORIZED));
    exchange.source = reply.from.map_or(NO_SOURCE, |from| from.as_str());
    if !session.is_body_empty() {
        // Somebody pushes: what they send is not read, so the connection cannot be used again.
        session.set_keepalive(None);
    }
    let mut head = reply.head(&exchange.id);
    if let Some(seal) = exchange.seal.take() {
        let (name, value) = seal.sign(exchange.status, &head.headers);
        head.insert_header(name, value)?;
    }
    if session.req_header().method == Method::HEAD {
        reply.body = Body::Memory(None);
        taken(session.write_response_header(Box::new(head))).await?;
        exchange.first_byte = Some(exchange.started.elapsed());
        return Ok(());
    }
    if let Body::File(reader) = &mut reply.body
        && reader.left() >= sendfile::WORTHWHILE
        && let Some(socket) = Socket::of_plain(session)
    {
        taken(sendfile::write_head(session, head)).await?;
        let mut sending = SendfileBody::new(socket, reader);
        while let Some(sent) = sending.next().await.map_err(|broken| exchange.broke(&broken))? {
            exchange.sent(sent);
        }
        return Ok(());
    }
    let small = socket::CORKED.contains(&reply.body.held());
    if small {
        socket::cork(session);
    }
    taken(session.write_response_header(Box::new(head))).await?;
    let client = if matches!(reply.body, Body::Memory(_)) { None } else { Socket::of(session) };
    loop {
        let next = tokio::select! {
            biased;
            next = reply.body.next() => next,
            () = left(session, client.as_ref()) => Err(Broken(LEFT.into())),
        };
        let Some(piece) = next.map_err(|broken| exchange.broke(&broken))? else { break };
        let len = piece.len() as u64;
        let mut writing = pin!(session.write_response_body(piece, false));
        let written = match timeout(STALL_TIMEOUT, &mut writing).await {
            Ok(written) => written,
            Err(_) => {
                reply.body.release();
                taken(writing).await
            }
        };
        written?;
        exchange.sent(len);
    }
    taken(session.write_response_body(Bytes::new(), true)).await?;
    if small {
        socket::uncork(session);
    }
    Ok(())
}

/// Writes, as long as the client takes anything. Pingora's own timeouts are for bodies only, and begin anew with each window
/// of HTTP/2.
async fn taken(writing: impl Future<Output = pingora::Result<()>>) -> pingora::Result<()> {
    let written = timeout(PATIENCE, writing).await;
    written.unwrap_or_else(|_| Error::e_explain(ErrorType::WriteTimedout, "the client takes too little"))
}

/// Ends when the client has left; its connection says so on HTTP/1.1, its stream on HTTP/2.
async fn left(session: &mut Session, socket: Option<&Socket>) {
    if let Some(socket) = socket {
        socket.closed().await;
    } else if let Some(closed) = session.watch_h2_stream_close() {
        let _ = closed.await;
    } else {
        std::future::pending::<()>().await;
    }
}
