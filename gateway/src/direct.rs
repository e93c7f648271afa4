//! The buyers' rpcs without gRPC's framing, for the one caller that is in this process: the transcoder.
//!
//! A call has its message beside an empty body, and so has its answer; everything around it, the layers, the front, the
//! headers and the handler, is that of a call by gRPC. What it saves is writing two bodies and reading them, and tonic's
//! routing: an eighth of what an accepted order costs the gateway's process.

use bytes::Bytes;
use http::{Request, Response, Uri, uri::PathAndQuery};
use prost::Message;
use proto::{Error, v1::orders_server::Orders as _};
use tonic::{Status, body::Body, metadata::MetadataMap};

use crate::service::orders::Orders;

/// A message, encoded, where a body would have it.
#[derive(Clone, Debug)]
struct Handed(Bytes);

/// Whether the rpc at this path can be called so.
pub fn has(path: &str) -> bool {
    path.strip_prefix("/seckill.v1.Orders/").is_some_and(|method| method != "WatchOrder")
}

/// A call as a request of HTTP.
pub fn request(path: PathAndQuery, call: tonic::Request<Bytes>) -> Request<Body> {
    let (metadata, mut extensions, message) = call.into_parts();
    extensions.insert(Handed(message));
    let mut request = Request::new(Body::empty());
    *request.method_mut() = http::Method::POST;
    *request.uri_mut() = Uri::from(path);
    *request.headers_mut() = metadata.into_headers();
    *request.extensions_mut() = extensions;
    request
}

/// What such a call came to.
pub fn answer<B>(mut response: Response<B>) -> Result<Bytes, Error> {
    let extensions = response.extensions_mut();
    match (extensions.remove::<Handed>(), extensions.remove::<Status>()) {
        (Some(Handed(message)), _) => Ok(message),
        (None, Some(status)) => Err(status.into()),
        (None, None) => Err(Error::internal("an answer without a message")),
    }
}

/// The call's message, when it is such a call.
pub fn take(request: &mut Request<Body>) -> Option<Bytes> {
    request.extensions_mut().remove::<Handed>().map(|Handed(message)| message)
}

/// Calls the handler.
pub async fn call(orders: &Orders, message: Bytes, request: Request<Body>) -> Response<Body> {
    let (parts, _) = request.into_parts();
    let call = tonic::Request::from_parts(MetadataMap::from_headers(parts.headers), parts.extensions, message);
    let answered = match parts.uri.path() {
        "/seckill.v1.Orders/PlaceOrder" => unary(call, |request| orders.place_order(request)).await,
        "/seckill.v1.Orders/GetOrder" => unary(call, |request| orders.get_order(request)).await,
        "/seckill.v1.Orders/ListOrders" => unary(call, |request| orders.list_orders(request)).await,
        "/seckill.v1.Orders/PayOrder" => unary(call, |request| orders.pay_order(request)).await,
        "/seckill.v1.Orders/CancelOrder" => unary(call, |request| orders.cancel_order(request)).await,
        path => Err(Error::internal(format!("{path} cannot be called so")).into()),
    };
    match answered {
        Ok(message) => {
            let mut response = Response::new(Body::empty());
            response.extensions_mut().insert(Handed(message));
            response
        }
        Err(status) => status.into_http(),
    }
}

async fn unary<Q, A, Answering>(
    call: tonic::Request<Bytes>,
    handler: impl FnOnce(tonic::Request<Q>) -> Answering,
) -> Result<Bytes, Status>
where
    Q: Message + Default,
    A: Message,
    Answering: Future<Output = Result<tonic::Response<A>, Status>>,
{
    let (metadata, extensions, message) = call.into_parts();
    let message = Q::decode(message).map_err(|error| Error::invalid("message", error.to_string()))?;
    let answer = handler(tonic::Request::from_parts(metadata, extensions, message)).await?;
    Ok(answer.into_inner().encode_to_vec().into())
}

#[cfg(test)]
mod tests {
    use prost_reflect::DescriptorPool;

    use super::*;

    /// A further rpc of buyers needs a line in [`call`].
    #[test]
    fn it_has_the_unary_rpcs_of_orders_and_no_others() {
        let pool = DescriptorPool::decode(proto::DESCRIPTORS).unwrap();
        let unary = |service: &str| {
            let methods = pool.get_service_by_name(service).unwrap().methods().collect::<Vec<_>>();
            methods.into_iter().map(|m| (m.name().to_owned(), !m.is_server_streaming())).collect::<Vec<_>>()
        };
        for (method, is_unary) in unary("seckill.v1.Orders") {
            assert_eq!(has(&format!("/seckill.v1.Orders/{method}")), is_unary, "{method}");
        }
        let known = ["PlaceOrder", "GetOrder", "ListOrders", "PayOrder", "CancelOrder"];
        assert_eq!(unary("seckill.v1.Orders").iter().filter(|(_, is_unary)| *is_unary).count(), known.len());
        assert!(!has("/seckill.v1.Sales/GetSale") && !has("/seckill.v1.OrdersOther/GetOrder"));
    }
}
