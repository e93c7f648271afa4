//! The network between roles: calls and answers get lost, come late or twice, and reach one replica or another.
//!
//! A call runs on a task of the replica that it reached, like on a server: it dies with it, and its caller then sees a
//! broken connection.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    fmt,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use http::{Request, Response, request::Parts};
use http_body_util::{BodyExt, Full};
use mesh::{layers::ClientConfig, lifecycle::Lifecycle, link::Link};
use tokio::sync::oneshot;
use tonic::{Status, body::Body};
use tower::{Service, ServiceExt, util::BoxCloneSyncService};

use crate::faults::{Fault, Hands, Port};

/// What a role is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    Stock,
    Order,
    Payment,
    Coordinator,
    Gateway,
}

impl Role {
    pub const ALL: [Role; 5] = [Role::Stock, Role::Payment, Role::Order, Role::Coordinator, Role::Gateway];
}

/// What answers a role's calls.
pub type Server = BoxCloneSyncService<Request<Body>, Response<Body>, Infallible>;

/// A replica that can be reached.
#[derive(Clone)]
pub struct Replica {
    pub server: Server,
    pub hands: Hands,
    pub life: Lifecycle,
}

/// Who can be reached. Cheap to clone.
#[derive(Clone, Default)]
pub struct Net(Arc<Mutex<BTreeMap<(Role, usize), Replica>>>);

impl fmt::Debug for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Net")
    }
}

impl Net {
    pub fn join(&self, role: Role, replica: usize, server: Replica) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert((role, replica), server);
    }

    pub fn leave(&self, role: Role, replica: usize) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&(role, replica));
    }

    /// Lets go of everybody: servers hold links, and links hold the net.
    pub fn close(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// The link from somebody to a role.
    pub fn link(&self, from: &Hands, to: Role) -> Link {
        Link::local(Wire { net: self.clone(), from: from.clone(), to }, ClientConfig::default())
    }

    /// Any replica of a role.
    fn pick(&self, from: &Hands, role: Role) -> Option<Replica> {
        let replicas = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut there: Vec<&Replica> = replicas.range((role, 0)..=(role, usize::MAX)).map(|(_, there)| there).collect();
        match there.len() {
            0 => None,
            1 => there.pop().cloned(),
            count => Some(there[from.run().below(count)].clone()),
        }
    }
}

/// A way from somebody to a role.
#[derive(Clone)]
struct Wire {
    net: Net,
    from: Hands,
    to: Role,
}

impl Service<Request<Body>> for Wire {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let wire = self.clone();
        Box::pin(async move { Ok(wire.send(request).await) })
    }
}

fn reset(why: &str) -> Response<Body> {
    Status::unavailable(format!("simulated: {why}")).into_http()
}

impl Wire {
    async fn send(self, request: Request<Body>) -> Response<Body> {
        let (parts, body) = request.into_parts();
        let Ok(body) = body.collect().await else { return reset("no body") };
        let body = body.to_bytes();
        self.from.able().await;
        let fate = self.from.draw(Port::Link);
        let path = parts.uri.path().rsplit('/').next().unwrap_or_default().to_owned();
        self.from.pause(fate.before).await;
        let Some(replica) = self.net.pick(&self.from, self.to) else {
            self.from.note(|| format!("-> {:?} {path}: nobody there", self.to));
            return reset("connection refused");
        };
        self.from.note(|| {
            let fault = fate.fault.map(|fault| format!(" but {fault:?}")).unwrap_or_default();
            format!("-> {} {path}{fault}", replica.hands.who())
        });
        match fate.fault {
            Some(Fault::Lost) => std::future::pending().await,
            Some(Fault::FailedBefore) => return reset("connection reset"),
            Some(Fault::Duplicated) => {
                // The other one comes when it comes, to whoever it comes to.
                let (wire, replica, parts, body) = (self.clone(), replica.clone(), parts.clone(), body.clone());
                let after = std::time::Duration::from_millis(wire.from.run().below(3_000) as u64);
                let path = path.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(after).await;
                    let replica = wire.net.pick(&wire.from, wire.to).unwrap_or(replica);
                    wire.from.note(|| format!("-> {} {path} once more", replica.hands.who()));
                    let _ = arrive(&replica, parts, body).await;
                });
            }
            _ => {}
        }
        let answered = arrive(&replica, parts, body).await;
        self.from.pause(fate.after).await;
        match (answered, fate.fault) {
            (_, Some(Fault::FailedAfter)) => reset("the answer got lost"),
            (Some(answer), _) => answer,
            (None, _) => reset("the peer died"),
        }
    }
}

/// Runs the call at the replica; none when that died of it.
async fn arrive(replica: &Replica, parts: Parts, body: bytes::Bytes) -> Option<Response<Body>> {
    let (reply, answer) = oneshot::channel();
    let Replica { server, hands, life } = replica.clone();
    life.clone().spawn(async move {
        hands.able().await;
        let Ok(answer) = server.oneshot(Request::from_parts(parts, Body::new(Full::new(body)))).await;
        let (head, body) = answer.into_parts();
        // Unary: the answer is whole when it is sent.
        if let Ok(body) = body.collect().await {
            hands.able().await;
            let _ = reply.send(Response::from_parts(head, Body::new(body)));
        }
    });
    answer.await.ok()
}
