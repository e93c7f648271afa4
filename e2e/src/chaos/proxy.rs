//! A TCP proxy with a fault in it, between one process and one thing it calls.
//!
//! Promises: bytes are never lost, doubled or reordered, as on a real network under TCP; what a black hole swallowed
//! arrives when it is lifted. A fault is in force for connections that exist and for new ones, at once.

use std::{io, net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::JoinHandle,
};

/// What a wire does to what goes through it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// Every piece arrives this much later, in both directions.
    Delay(Duration),
    /// Connections live and say nothing.
    BlackHole,
    /// Connections are broken, and so is every new one.
    Cut,
}

/// A running proxy. Ends, with its connections, when dropped.
#[derive(Debug)]
pub struct Proxy {
    /// Where to connect instead of to the target.
    pub address: SocketAddr,
    fault: watch::Sender<Fault>,
    accepting: JoinHandle<()>,
}

impl Proxy {
    /// A proxy before `target`, without a fault.
    pub async fn to(target: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let (fault, watched) = watch::channel(Fault::None);
        let accepting = tokio::spawn(async move {
            // An accept fails for want of descriptors, mostly; whoever asked asks again.
            loop {
                if let Ok((near, _)) = listener.accept().await {
                    tokio::spawn(connection(near, target, watched.clone()));
                }
            }
        });
        Ok(Self { address, fault, accepting })
    }

    /// From now on.
    pub fn set(&self, fault: Fault) {
        self.fault.send_replace(fault);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
        self.fault.send_replace(Fault::Cut);
    }
}

/// Dropping both streams is how a connection is broken: the peer sees it end.
async fn connection(near: TcpStream, target: SocketAddr, fault: watch::Receiver<Fault>) {
    if !passes(&mut fault.clone()).await {
        return;
    }
    let Ok(far) = TcpStream::connect(target).await else { return };
    // A proxy that gathered small pieces would be a delay that nobody asked for.
    if near.set_nodelay(true).and(far.set_nodelay(true)).is_err() {
        return;
    }
    let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
    tokio::select! {
        _ = async { tokio::join!(pump(near_in, far_out, fault.clone()), pump(far_in, near_out, fault.clone())) } => {}
        () = until_cut(fault.clone()) => {}
    }
}

/// One direction. Ends with it, and tells the other side so, as TCP does.
async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut fault: watch::Receiver<Fault>) {
    let mut piece = vec![0; 16 * 1024];
    loop {
        let Ok(length @ 1..) = from.read(&mut piece).await else { return };
        if !passes(&mut fault).await || to.write_all(&piece[..length]).await.is_err() {
            return;
        }
    }
}

/// Waits as the fault demands; false when it demands an end.
async fn passes(fault: &mut watch::Receiver<Fault>) -> bool {
    loop {
        let now = *fault.borrow_and_update();
        match now {
            Fault::None => return true,
            Fault::Cut => return false,
            Fault::Delay(delay) => {
                tokio::time::sleep(delay).await;
                return true;
            }
            Fault::BlackHole if fault.changed().await.is_err() => return false,
            Fault::BlackHole => {}
        }
    }
}

async fn until_cut(mut fault: watch::Receiver<Fault>) {
    // An error is the proxy's end, which is a cut as well.
    let _ = fault.wait_for(|fault| *fault == Fault::Cut).await;
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    /// An echo server, a proxy before it and a connection through that.
    async fn wire() -> (Proxy, TcpStream) {
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let target = server.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((stream, _)) = server.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = stream.into_split();
                    tokio::io::copy(&mut from, &mut to).await
                });
            }
        });
        let proxy = Proxy::to(target).await.unwrap();
        let stream = TcpStream::connect(proxy.address).await.unwrap();
        (proxy, stream)
    }

    async fn echo(stream: &mut TcpStream) -> io::Result<[u8; 4]> {
        let mut answer = [0; 4];
        stream.write_all(b"ping").await?;
        stream.read_exact(&mut answer).await?;
        Ok(answer)
    }

    #[tokio::test]
    async fn a_wire_without_fault_passes_and_a_delayed_one_passes_later() {
        let (proxy, mut stream) = wire().await;
        assert_eq!(&echo(&mut stream).await.unwrap(), b"ping");
        proxy.set(Fault::Delay(Duration::from_millis(50)));
        let sent = Instant::now();
        assert_eq!(&echo(&mut stream).await.unwrap(), b"ping");
        assert!(sent.elapsed() >= Duration::from_millis(100), "there and back");
    }

    #[tokio::test]
    async fn what_a_black_hole_holds_back_arrives_when_it_is_lifted() {
        let (proxy, mut stream) = wire().await;
        echo(&mut stream).await.unwrap();
        proxy.set(Fault::BlackHole);
        let silent = tokio::time::timeout(Duration::from_millis(100), echo(&mut stream)).await;
        assert!(silent.is_err(), "nothing comes through");
        proxy.set(Fault::None);
        let mut answer = [0; 4];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"ping");
    }

    #[tokio::test]
    async fn a_cut_breaks_connections_old_and_new_until_it_is_mended() {
        let (proxy, mut stream) = wire().await;
        echo(&mut stream).await.unwrap();
        proxy.set(Fault::Cut);
        assert!(echo(&mut stream).await.is_err());
        let mut second = TcpStream::connect(proxy.address).await.unwrap();
        assert!(echo(&mut second).await.is_err());
        proxy.set(Fault::None);
        let mut third = TcpStream::connect(proxy.address).await.unwrap();
        assert_eq!(&echo(&mut third).await.unwrap(), b"ping");
    }
}
