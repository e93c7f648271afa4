-- Answers: nothing when lost, otherwise every field.
if redis.call('EXISTS', HEADER) == 0 then return {} end
return redis.call('HMGET', HEADER, 'epoch', 'phase', 'free', 'granted', 'snapshot', 'version', 'server',
  'facts', 'verb', 'start', 'stop', 'limit', 'total', 'sold')
