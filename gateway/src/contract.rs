//! The public contract as data: which rpc is reached by which HTTP route, read from the .proto annotations.
//!
//! The transcoder, the OpenAPI document and reflection are all made from this one reading, so that they cannot
//! disagree. Everything is computed once, at start; finding a route allocates nothing but its path variables.

use std::{borrow::Cow, sync::Arc};

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use http::{Method, uri::PathAndQuery};
use percent_encoding::percent_decode_str;
use prost::Message;
use prost_reflect::{
    Cardinality, DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MessageDescriptor, MethodDescriptor, Value,
};
use proto::Error;

/// The package that clients see. Nothing of any other of our packages is served or described.
pub const PACKAGE: &str = "seckill.v1";

/// Every route of the public services.
#[derive(Debug)]
pub struct Contract {
    pool: DescriptorPool,
    routes: Vec<Route>,
}

/// One rpc on HTTP.
#[derive(Debug)]
pub struct Route {
    /// The HTTP method.
    pub method: Method,
    /// As annotated, e.g. `/v1/orders/{order}:pay`. Also the route's label on metrics.
    pub template: Arc<str>,
    /// Where it is on gRPC.
    pub grpc_path: PathAndQuery,
    /// The rpc.
    pub rpc: MethodDescriptor,
    /// What it takes.
    pub input: MessageDescriptor,
    /// What it answers.
    pub output: MessageDescriptor,
    /// Whether the request's fields come in the body; otherwise in the query.
    pub has_body: bool,
    /// Whether it answers 202 as long as what it made is only accepted.
    pub accepts: bool,
    /// Whether it answers an order.
    pub answers_order: bool,
    /// The field that the `Idempotency-Key` header fills, where there is one.
    pub request_id: Option<FieldDescriptor>,
    segments: Vec<Segment>,
    verb: Option<String>,
}

#[derive(Debug)]
enum Segment {
    Literal(String),
    Variable(FieldDescriptor),
}

/// The values of a path's variables, decoded.
pub type Variables<'a> = Vec<(&'a FieldDescriptor, Cow<'a, str>)>;

/// What a method and a path lead to.
#[derive(Debug)]
pub enum Match<'a> {
    /// The route at this index, with these values of its path's variables.
    Route(usize, Variables<'a>),
    /// Known, but only by these methods.
    OtherMethods(Vec<&'a Method>),
    /// A variable that is no text.
    Malformed(Error),
    /// No such path.
    Nothing,
}

impl Contract {
    /// Reads the annotations. Fails on what the transcoder could not serve.
    pub fn load() -> anyhow::Result<Self> {
        let pool = DescriptorPool::decode(proto::DESCRIPTORS).context("descriptors")?;
        let http = pool.get_extension_by_name("google.api.http").context("google.api.http is not among the protos")?;
        let mut routes = Vec::new();
        for rpc in pool.services().filter(|s| s.package_name() == PACKAGE).flat_map(|s| s.methods().collect::<Vec<_>>())
        {
            let options = rpc.options();
            let rule = options.get_extension(&http);
            let rule = rule.as_message().with_context(|| format!("{} has no HTTP route", rpc.full_name()))?;
            routes.push(Route::read(rpc.clone(), rule).with_context(|| rpc.full_name().to_owned())?);
        }
        for (i, route) in routes.iter().enumerate() {
            let twin = routes[..i].iter().find(|r| r.method == route.method && r.template == route.template);
            ensure!(twin.is_none(), "{} {} is annotated twice", route.method, route.template);
        }
        Ok(Self { pool, routes })
    }

    /// Every route, in the order of the .proto files.
    pub fn routes(&self) -> &[Route] {
        &self.routes
    }

    /// Every descriptor.
    pub fn pool(&self) -> &DescriptorPool {
        &self.pool
    }

    /// The route of a request. `path` is as on the wire, still percent-encoded.
    pub fn find<'a>(&'a self, method: &Method, path: &'a str) -> Match<'a> {
        let mut others = Vec::new();
        for (index, route) in self.routes.iter().enumerate() {
            let Some(variables) = route.variables_in(path) else { continue };
            if route.method == *method {
                return match variables {
                    Ok(variables) => Match::Route(index, variables),
                    Err(error) => Match::Malformed(error),
                };
            }
            others.push(&route.method);
        }
        if others.is_empty() { Match::Nothing } else { Match::OtherMethods(others) }
    }
}

impl Route {
    fn read(rpc: MethodDescriptor, rule: &DynamicMessage) -> anyhow::Result<Self> {
        let (method, template) = [Method::GET, Method::PUT, Method::POST, Method::DELETE, Method::PATCH]
            .into_iter()
            .find_map(|method| {
                let field = method.as_str().to_ascii_lowercase();
                let template = rule.has_field_by_name(&field).then(|| rule.get_field_by_name(&field))??;
                Some((method, template.as_str()?.to_owned()))
            })
            .context("no HTTP method")?;
        ensure!(!rpc.is_client_streaming(), "client streams have no HTTP form");
        let body = match rule.get_field_by_name("body").as_deref() {
            Some(Value::String(body)) => body.clone(),
            _ => String::new(),
        };
        ensure!(body.is_empty() || body == "*", "only a body of \"*\" is understood");

        let input = rpc.input();
        let path = template.strip_prefix('/').context("the path must begin with a slash")?;
        // The verb comes after the last variable, so a colon inside braces is none.
        let (path, verb) = match path.rfind(':') {
            Some(at) if path.rfind('}').is_none_or(|brace| brace < at) => {
                (&path[..at], Some(path[at + 1..].to_owned()))
            }
            _ => (path, None),
        };
        let segments = path.split('/').map(|s| Segment::read(s, &input)).collect::<anyhow::Result<_>>()?;
        Ok(Self {
            grpc_path: format!("/{}/{}", rpc.parent_service().full_name(), rpc.name()).parse()?,
            has_body: !body.is_empty(),
            accepts: rpc.full_name() == "seckill.v1.Orders.PlaceOrder",
            request_id: input.get_field_by_name("request_id"),
            answers_order: rpc.output().full_name() == "seckill.v1.Order" && !rpc.is_server_streaming(),
            output: rpc.output(),
            template: template.into(),
            method,
            rpc,
            input,
            segments,
            verb,
        })
    }

    /// The path's variables, when it is one of this route's.
    fn variables_in<'a>(&'a self, path: &'a str) -> Option<Result<Variables<'a>, Error>> {
        let mut path = path.strip_prefix('/')?;
        if let Some(verb) = &self.verb {
            path = path.strip_suffix(verb.as_str())?.strip_suffix(':')?;
        }
        let mut given = path.split('/');
        let mut variables = Vec::new();
        for segment in &self.segments {
            let text = given.next()?;
            match segment {
                Segment::Literal(literal) if literal == text => {}
                Segment::Literal(_) => return None,
                Segment::Variable(_) if text.is_empty() => return None,
                Segment::Variable(field) => variables.push((field, text)),
            }
        }
        if given.next().is_some() {
            return None;
        }
        let decode = |(field, text): (&'a FieldDescriptor, &'a str)| match percent_decode_str(text).decode_utf8() {
            Ok(value) => Ok((field, value)),
            Err(_) => Err(Error::invalid(field.name(), "must be UTF-8")),
        };
        Some(variables.into_iter().map(decode).collect())
    }

    /// The fields that the path gives.
    pub fn path_fields(&self) -> impl Iterator<Item = &FieldDescriptor> {
        self.segments.iter().filter_map(|s| match s {
            Segment::Variable(field) => Some(field),
            Segment::Literal(_) => None,
        })
    }

    /// The field that a query parameter of this name gives, if any: one value, not already in the path.
    pub fn query_field(&self, name: &str) -> Option<FieldDescriptor> {
        self.query_fields().find(|f| f.json_name() == name || f.name() == name)
    }

    /// The fields that query parameters give.
    pub fn query_fields(&self) -> impl Iterator<Item = FieldDescriptor> {
        let fields = (!self.has_body).then(|| self.input.fields()).into_iter().flatten();
        fields.filter(|f| is_single(f) && !self.path_fields().any(|p| p.number() == f.number()))
    }
}

impl Segment {
    fn read(text: &str, input: &MessageDescriptor) -> anyhow::Result<Self> {
        let Some(variable) = text.strip_prefix('{') else { return Ok(Self::Literal(text.to_owned())) };
        let name = variable.strip_suffix('}').context("a variable must fill its segment")?;
        let field = input.get_field_by_name(name).with_context(|| format!("no field {name}"))?;
        if field.kind() != Kind::String || field.cardinality() == Cardinality::Repeated {
            bail!("the path variable {name} must be a string");
        }
        Ok(Self::Variable(field))
    }
}

/// Whether a field can be written as one text: a scalar, or a message that is a string in JSON.
fn is_single(field: &FieldDescriptor) -> bool {
    let text_message =
        |m: &MessageDescriptor| matches!(m.full_name(), "google.protobuf.Duration" | "google.protobuf.Timestamp");
    field.cardinality() != Cardinality::Repeated
        && match field.kind() {
            Kind::Message(message) => text_message(&message),
            _ => true,
        }
}

/// The encoded descriptors that clients may see: ours without the internal packages. The bytes of each file are kept
/// as they are, or the annotations, which prost does not know, would be lost.
pub fn public_descriptors() -> anyhow::Result<Vec<u8>> {
    #[derive(Clone, PartialEq, Message)]
    struct Files {
        #[prost(bytes = "bytes", repeated, tag = "1")]
        file: Vec<Bytes>,
    }
    let mut files = Files::decode(proto::DESCRIPTORS)?;
    let mut public = Vec::new();
    for file in files.file {
        let package = prost_types::FileDescriptorProto::decode(file.clone())?;
        if !package.package().starts_with("seckill.internal") {
            public.push(file);
        }
    }
    files.file = public;
    Ok(files.encode_to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(contract: &Contract, method: Method, path: &str) -> String {
        match contract.find(&method, path) {
            Match::Route(index, variables) => {
                let route = &contract.routes()[index];
                let variables: Vec<_> = variables.iter().map(|(f, v)| format!("{}={v}", f.name())).collect();
                format!("{} {}", route.rpc.name(), variables.join(","))
            }
            Match::OtherMethods(methods) => format!("not {method} but {methods:?}"),
            Match::Malformed(error) => error.message,
            Match::Nothing => "nothing".to_owned(),
        }
    }

    #[test]
    fn paths_lead_to_rpcs() {
        let contract = Contract::load().unwrap();
        for (method, path, expected) in [
            (Method::POST, "/v1/orders", "PlaceOrder "),
            (Method::GET, "/v1/orders", "ListOrders "),
            (Method::GET, "/v1/orders/7", "GetOrder order=7"),
            (Method::GET, "/v1/orders/orders%2F7", "GetOrder order=orders/7"),
            (Method::POST, "/v1/orders/7:pay", "PayOrder order=7"),
            (Method::POST, "/v1/orders/a:b:cancel", "CancelOrder order=a:b"),
            (Method::GET, "/v1/orders/7/events", "WatchOrder order=7"),
            (Method::GET, "/v1/sales/s/stock", "GetStock sale=s"),
            (Method::POST, "/v1/sales/s:rebuildStock", "RebuildStock sale=s"),
            (Method::GET, "/v1/orders/%ff", "order: must be UTF-8"),
            (Method::DELETE, "/v1/orders", "not DELETE but [POST, GET]"),
            (Method::POST, "/v1/orders/7", "not POST but [GET]"),
            (Method::POST, "/v1/orders/:pay", "not POST but [GET]"),
            (Method::GET, "/v1/orders/", "nothing"),
            (Method::GET, "/v1/orders/7/", "nothing"),
            (Method::GET, "/v2/orders", "nothing"),
            (Method::GET, "", "nothing"),
        ] {
            assert_eq!(found(&contract, method, path), expected, "{path}");
        }
    }

    #[test]
    fn internal_packages_are_not_described() {
        let files = prost_types::FileDescriptorSet::decode(public_descriptors().unwrap().as_slice()).unwrap();
        assert!(files.file.iter().any(|f| f.package() == PACKAGE));
        assert!(files.file.iter().all(|f| !f.package().contains("internal")), "I11");
    }
}
