//! The leanest HTTP/1.1 client that still is one: the load runs on the cores it measures, so whatever it spends is
//! missing there. One request at a time per connection, a body by its length, nothing else.

use std::{io, net::SocketAddr};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// Longer than any answer that a scenario waits for.
const LARGEST_ANSWER: usize = 1 << 20;

/// An answer. The body stays in the connection's buffer.
#[derive(Clone, Copy, Debug)]
pub struct Answer<'a> {
    /// HTTP status.
    pub status: u16,
    /// The body.
    pub body: &'a [u8],
}

impl Answer<'_> {
    /// The string after `"key":"`, where there is one: enough for the few fields that a buyer looks at.
    pub fn text(&self, key: &str) -> Option<&str> {
        let body = std::str::from_utf8(self.body).ok()?;
        let mut rest = body;
        loop {
            rest = &rest[rest.find(key)? + key.len()..];
            if let Some(value) = rest.strip_prefix("\":\"") {
                return value.split('"').next();
            }
        }
    }

    /// The reason of a refusal, or the bare status.
    pub fn reason(&self) -> String {
        self.text("reason").map_or_else(|| self.status.to_string(), str::to_owned)
    }
}

/// A keep-alive connection, opened when it is first used and again after an error.
#[derive(Debug)]
pub struct Connection {
    address: SocketAddr,
    stream: Option<TcpStream>,
    request: Vec<u8>,
    answer: Vec<u8>,
}

impl Connection {
    /// To this server.
    pub fn new(address: SocketAddr) -> Self {
        Self { address, stream: None, request: Vec::with_capacity(1024), answer: Vec::with_capacity(4096) }
    }

    /// Gives the connection up: what was asked last may still be answered.
    pub fn reset(&mut self) {
        self.stream = None;
    }

    /// Sends a request and reads its answer. After an error its outcome is unknown.
    pub async fn call(&mut self, request: &Request<'_>) -> io::Result<Answer<'_>> {
        self.request.clear();
        request.write(&mut self.request);
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => {
                let stream = TcpStream::connect(self.address).await?;
                stream.set_nodelay(true)?;
                stream
            }
        };
        stream.write_all(&self.request).await?;
        self.answer.clear();
        let (status, head, length) = loop {
            if stream.read_buf(&mut self.answer).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if let Some(parts) = head(&self.answer)? {
                break parts;
            }
        };
        while self.answer.len() < head + length {
            if stream.read_buf(&mut self.answer).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        self.stream = Some(stream);
        Ok(Answer { status, body: &self.answer[head..head + length] })
    }
}

/// A request.
#[derive(Clone, Copy, Debug, Default)]
pub struct Request<'a> {
    /// `GET` or `POST`.
    pub method: &'static str,
    /// The path with its query.
    pub path: &'a str,
    /// `Authorization`, whole.
    pub authorization: &'a str,
    /// `Idempotency-Key`.
    pub key: &'a str,
    /// The body: JSON.
    pub body: &'a str,
}

impl Request<'_> {
    fn write(&self, buffer: &mut Vec<u8>) {
        let mut put = |parts: &[&str]| parts.iter().for_each(|part| buffer.extend_from_slice(part.as_bytes()));
        put(&[self.method, " ", self.path, " HTTP/1.1\r\nHost: bench\r\n"]);
        if !self.authorization.is_empty() {
            put(&["Authorization: ", self.authorization, "\r\n"]);
        }
        if !self.key.is_empty() {
            put(&["Idempotency-Key: ", self.key, "\r\n"]);
        }
        if !self.body.is_empty() {
            put(&["Content-Type: application/json\r\nContent-Length: ", &self.body.len().to_string(), "\r\n"]);
        }
        put(&["\r\n", self.body]);
    }
}

/// Status, where the body begins, how long it is; none while the head is incomplete.
fn head(answer: &[u8]) -> io::Result<Option<(u16, usize, usize)>> {
    let Some(end) = answer.windows(4).position(|four| four == b"\r\n\r\n") else {
        return if answer.len() > LARGEST_ANSWER { Err(garbled("head")) } else { Ok(None) };
    };
    let text = std::str::from_utf8(&answer[..end]).map_err(|_| garbled("head"))?;
    let mut lines = text.split("\r\n");
    let status = lines.next().and_then(|line| line.get(9..12)?.parse().ok()).ok_or_else(|| garbled("status"))?;
    let length = lines
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .map_or(Some(0), |(_, value)| value.trim().parse().ok())
        .filter(|length| *length <= LARGEST_ANSWER)
        .ok_or_else(|| garbled("length"))?;
    Ok(Some((status, end + 4, length)))
}

fn garbled(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("an answer without a proper {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_read_once_it_is_whole() {
        let answer = b"HTTP/1.1 202 Accepted\r\nContent-Type: x\r\ncontent-length: 2\r\n\r\n{}";
        assert_eq!(head(answer).unwrap(), Some((202, answer.len() - 2, 2)));
        assert_eq!(head(&answer[..30]).unwrap(), None);
        assert!(head(b"HTTP/1.1 999999\r\ncontent-length: -1\r\n\r\n").is_err());
    }

    #[test]
    fn fields_are_found_by_name() {
        let body = br#"{"name":"orders/1","state":"PLACED"}"#;
        let answer = Answer { status: 202, body };
        assert_eq!((answer.text("state"), answer.text("name")), (Some("PLACED"), Some("orders/1")));
        assert_eq!((answer.text("sale"), answer.reason()), (None, "202".to_owned()));
    }
}
