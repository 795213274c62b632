-- Gives the lease of a hub that stops back, and tells the others, one of which takes it at once.
-- KEYS 1 lease
-- ARGV 1 hub, 2 live channel
if redis.call('GET', KEYS[1]) == ARGV[1] then
  redis.call('DEL', KEYS[1])
  redis.call('PUBLISH', ARGV[2], 'F\n')
end
return ''
